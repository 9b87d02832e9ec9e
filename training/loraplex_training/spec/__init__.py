"""What a training run is asked to do: options, their limits and flags, sweeps.

Owns every option's name, default and range. Imports no torch and reads no data.
"""
