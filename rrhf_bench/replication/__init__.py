"""The RRHF paper (arXiv 2304.05302) inside the bench: what a report of a run with an RRHF row says beside the paper."""
