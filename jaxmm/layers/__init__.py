"""Building blocks of networks: linear maps, norms, rotary positions, MLPs, patches, timesteps, convolutions.

`parameters.py` says how a parameter is described, once, and how a network is bound to a plain dict of arrays.
"""
