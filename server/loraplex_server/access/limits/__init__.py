"""What principals may use: rates, places, and room in the store."""
