"""What all ways of asking for a completion share: sampling, structure, usage, log-probabilities."""
