"""Bring the monitor's database to this version and end: `python -m monitoring.migration`.

The monitor does the same at its start. On Kubernetes, a job runs this once before several monitors start.
"""

import time

from mlflow_tracking.command_line import console, run
from mlflow_tracking.stack_settings import Settings
from monitoring.prediction_store import PredictionStore, StoreUnavailable

PATIENCE = 60.0


def main() -> None:
    """Make or upgrade the tables in the database of MONITOR_DATABASE; wait a minute until it answers."""
    store, end = PredictionStore(Settings.load().monitor_database_url), time.monotonic() + PATIENCE
    while True:
        try:
            store.migrate()
        except StoreUnavailable:
            if time.monotonic() > end:
                raise
            time.sleep(1)
        else:
            console.print("The monitor's tables are those of this version.")
            return


if __name__ == "__main__":
    run(main)
