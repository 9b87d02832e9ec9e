"""The Loraplex server: the engine, the gRPC services, and the process that joins them."""

import os

# The library below gRPC writes bytes of any peer, line breaks included, to standard error. It reads
# its level when it is imported, so this has to come before.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
