"""Command-line tools of the project; the scripts here are run, the packages imported."""
