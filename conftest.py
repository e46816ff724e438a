"""Root of the suite: the plugin brings options, markers, gates and the results file."""

pytest_plugins = ["libortho.plugin"]
