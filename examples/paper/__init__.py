"""The settings of the paper, and how its data are prepared."""
