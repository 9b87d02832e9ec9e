"""What a backup of the store takes along of the training jobs."""
