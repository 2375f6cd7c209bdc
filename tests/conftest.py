"""Properties are tried on the same examples every time, so that a failure is the change's and not the day's."""

from hypothesis import settings

settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")
