"""What one request meets, in its order: guard, exchange, gateway, limits, tenants, admission, resume, engine client."""
