"""Memory for large tables: huge pages, and pinned host memory."""
