"""`/v1/completions`: prompts are continued, whole or in parts."""
