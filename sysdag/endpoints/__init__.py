"""Services behind a URL: how they are asked, and what is never sent to them."""
