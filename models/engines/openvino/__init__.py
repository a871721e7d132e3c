"""Networks of other engines converted to OpenVINO: the same predictions, faster on a CPU, without torch."""
