"""What a client computes in one round, for each method; none of them knows Flower."""
