"""A config file for `--config`: its argument holds what `extended` needs, as a query such as workdir=DIR&to=4096."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

from etils import epath

from deltaformer_jax.config import Config
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.extension.plan import extended


def argument(workdir: str, to: int, method: str, steps: int, base: float | None) -> str:
    return urlencode({"workdir": workdir, "to": to, "method": method, "steps": steps, "base": base or ""})


def get_config(text: str) -> Config:
    given = dict(parse_qsl(text, keep_blank_values=True))
    before = Saved.read(epath.Path(given["workdir"])).config
    base = float(given["base"]) if given["base"] else None
    return extended(before, given["workdir"], int(given["to"]), given["method"], int(given["steps"]), base)
