raise RuntimeError("the driver is older than the framework")
