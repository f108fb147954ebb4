"""The stages of the pipeline, a page each: options, plan and fan-out. `pipeline.py` is the table of contents."""

# Ray reads its settings when it is imported, and these make them.
from wmdd_ray import executors as executors
