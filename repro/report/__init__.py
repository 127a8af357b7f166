"""From records to what people read: tables, figures, pages. Knows no model and imports no torch."""
