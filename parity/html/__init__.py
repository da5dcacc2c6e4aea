"""The report of a parity run as one page: data, then figures, then the template.

:func:`dsv4_convert.parity.html.page.page` makes it.
"""
