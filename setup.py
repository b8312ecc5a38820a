"""Map the source folders to packages; everything else is in pyproject.toml.

kernels/ stands at the top level for readers and is installed as relssl.kernels
("kernels" alone is another project's name).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["relssl", "relssl.*"]), "relssl.kernels"],
    package_dir={"relssl": "relssl", "relssl.kernels": "kernels"},
    package_data={"relssl": ["py.typed"]},
)
