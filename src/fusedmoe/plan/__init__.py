"""Problem x Target -> Plan. Pure Python, no triton: tested where there is no GPU."""
