"""The mathematics: random bases, projection and reconstruction. Knows neither Flower nor models."""
