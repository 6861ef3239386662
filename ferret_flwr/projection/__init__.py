"""The mathematics: random bases, projection and reconstruction. Knows neither Flower nor models."""

import os
import sys

# When numba starts its threads it sets OpenMP's number, which is torch's as well, to its own: all
# processors. Ray gives each of its actors a share of them in OMP_NUM_THREADS; numba keeps to it.
_share = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
if _share.isdigit() and int(_share) > 0 and "numba" not in sys.modules:
    os.environ.setdefault("NUMBA_NUM_THREADS", _share)
