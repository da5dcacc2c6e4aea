"""The report of a parity run as one page: :func:`dsv4_convert.parity.html.page.page`. Data, then figures, then the template."""
