"""What the server reports about itself besides its counters: residency, states, traces of calls.

Nothing here runs per token. States are read when Prometheus asks for them; spans are made when a
call ends a phase, and only if `otlp_endpoint` is set.
"""
