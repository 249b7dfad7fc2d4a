"""The page that shows what is stuck, and the audit that its actions write."""
