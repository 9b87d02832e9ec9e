"""The programs that `bench_peers.py` compares, one module each, behind the face of `face.py`."""
