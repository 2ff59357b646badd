"""Tools to test kernels and schemes, public so that users can test their own."""
