"""Fixtures shared by all rooms, one file per thing that is started or built."""

pytest_plugins = [
    "tests.fixtures.ray_session",
    "tests.fixtures.s3",
    "tests.fixtures.fault_proxy",
    "tests.fixtures.small_disk",
    "tests.fixtures.tiny",
]
