"""The report of one evaluation: a self-contained HTML page and a Markdown table."""
