"""No telemetry of OpenVINO's converter and of NNCF."""

from __future__ import annotations

import sys


def opt_out() -> None:
    """To be called before they are imported: what their makers have for an environment without the package that sends.

    Otherwise each conversion tells a server on the internet of itself, and threads that load certificates for that take
    longer than the conversion. Where a program imported the package itself, its choice holds.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
