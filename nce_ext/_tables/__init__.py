"""Where large tables lie: in huge pages, or in pinned host memory."""
