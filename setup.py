import re
from glob import glob

from setuptools import setup

with open("idpot.py", encoding="utf-8") as file:
    version = re.search(r'^__version__ = "(.+)"$', file.read(), re.M)[1]
with open("README.rst", encoding="utf-8") as file:
    readme = file.read()

setup(
    name="idpot",
    version=version,
    description="Serial 64-bit IDs over HTTP, from MySQL, MariaDB or SQLite",
    long_description=readme,
    long_description_content_type="text/x-rst",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["serial ID", "sequence", "counter", "ticket server", "MySQL", "MariaDB", "SQLite"],
    py_modules=["idpot"],
    data_files=[
        ("share/idpot", ["idpot.cfg.example", "README.rst"]),
        ("share/idpot/contrib", ["contrib/install", *sorted(glob("contrib/*.*"))]),
    ],
    python_requires=">=3.10",
    install_requires=["mysql-connector-python>=9.2"],
    extras_require={"test": ["pytest"]},
    entry_points={"console_scripts": ["idpot = idpot:main"]},
    classifiers=[
        "Environment :: No Input/Output (Daemon)",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Database",
    ],
)
