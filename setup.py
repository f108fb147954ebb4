"""Where the packages of the wheel lie; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

# A checkout has the jobs beside the package, where they are typed; `jobs` is no name to claim among everybody's packages.
JOBS = [
    f"wmdd_ray.jobs.{name}" for name in find_namespace_packages("jobs", exclude=["benches.results"])
]
setup(
    packages=[*find_packages(include=["wmdd_ray*"]), "wmdd_ray.jobs", *JOBS],
    package_dir={"wmdd_ray.jobs": "jobs"},
)
