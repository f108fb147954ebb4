"""Where units of work run: the only code of the package that knows Ray."""

import os
import secrets

# Machines of an autoscaler take minutes to come; after a minute Ray Train would take its demand back and begin anew.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
# A driver whose head is gone would wait a minute for it to come back, which no lost head does.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
# Ray reads these settings when it is imported, so they are made here, before any stage imports it, for a run that
# starts its own Ray.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this, Ray replaces 127.0.0.1 by the machine's own address.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray Data makes the core worker print an error about its own actors on every run; Python exceptions say what matters.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A token of its own: with none, other users of the machine could run code in it, and Ray's default would leave a
    # token file in the home folder that makes a later `ray start --head` ask for it.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
