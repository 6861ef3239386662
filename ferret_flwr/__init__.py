"""Ferret on Flower: federated full-parameter tuning of language models in kilobytes a round."""

import os
import sys

__version__ = "0.1.0"

# When numba starts its threads it sets OpenMP's number, which is torch's as well, to its own: all
# processors. Ray gives each of its actors a share of them in OMP_NUM_THREADS; numba keeps to it.
# Here, as numba reads the variable when it is imported, which is before any other module of ours.
_share = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
if _share.isdigit() and int(_share) > 0 and "numba" not in sys.modules:
    os.environ.setdefault("NUMBA_NUM_THREADS", _share)
