"""The report of a parity run as one page: :func:`parity.html.page.page`. Data, then figures, then the template."""
