"""Times the operators; `python -m bench` lists the suites. bench/evidence is the research."""
