"""Its import fails, as that of a package built for another machine does."""

raise OSError("libexample.so.1: cannot open shared object file")
