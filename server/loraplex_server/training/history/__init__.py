"""What happened to training jobs: events, kept with each job."""
