"""The base models that a node has been sent: in this process, and on its disk for the next."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from ferret_flwr.base import Base, BaseError
from ferret_flwr.flower.cache import KEEP_SECONDS
from ferret_flwr.flower.wire import Request
from ferret_flwr.follower import Follower

log = logging.getLogger(__name__)

# A process has one model at a time, for however many nodes it answers: key -> (base, its replica).
_live: dict[tuple[str, str], tuple[Base, Follower]] = {}


class MissingBaseError(RuntimeError):
    """The node does not have the base model that a request names."""


def base_of(request: Request, folder: Path) -> tuple[Base, Follower]:
    """Return the base that ``request`` names, and the process's replica of it.

    Parameters
    ----------
    request
        From the server.
    folder
        Where the node keeps its caches. A base that the request brings is written there, so that
        it is sent once; deleting it at any time changes no result.

    Raises
    ------
    MissingBaseError
        If the node does not have it and the request does not bring it.
    BaseError
        If what the request brings is not what it names.
    """
    header = request.header
    key = header.layout, header.base
    if key not in _live:
        path = folder / "bases" / f"{header.base}-{header.layout}.safetensors"
        base = _brought(request, path) if request.base else _kept(request, path)
        _live.clear()
        _live[key] = base, Follower(base.layout, base.masters)
    return _live[key]


def _brought(request: Request, path: Path) -> Base:
    base = request.base
    assert base is not None
    if not base.fits(request.header):
        raise BaseError("the base model that the server has sent is not the one that it names")
    try:
        base.save(path)
        _forget_old(path.parent)
    except OSError as error:
        log.warning("cannot write the base model '%s': %s", path, error.strerror)
    return base


def _kept(request: Request, path: Path) -> Base:
    try:
        base = Base.load(path)
        if not base.fits(request.header):
            raise BaseError(f"'{path}' holds another base model than its name says")
    except BaseError as error:
        path.unlink(missing_ok=True)
        raise MissingBaseError(
            f"this node lacks the base model {request.header.base} and needs it: {error}"
        ) from error
    with suppress(OSError):
        os.utime(path)
    return base


def _forget_old(folder: Path) -> None:
    """Remove bases that nobody has used for long."""
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # another node may have just removed it
            if time.time() - path.stat().st_mtime > KEEP_SECONDS:
                path.unlink()
