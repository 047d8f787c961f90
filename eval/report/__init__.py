"""The report of one evaluation is a self-contained HTML page and a Markdown table."""
