"""The web console: one page that talks to the gateway's HTTP interface, and to nothing else."""
