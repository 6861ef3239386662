"""Recipes, and Flower projects that Ferret is plugged into."""
