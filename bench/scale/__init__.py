"""A fleet of servers, simulated from the measured costs of one."""
