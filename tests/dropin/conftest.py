"""The scripts are run, not collected: they import their neighbours by name."""

collect_ignore_glob = ["[!t]*.py"]
