-- Show a saga with its entries.
-- ARGV: format, id
-- Reply: {0} where there is none, or {2, now (ms), fields and values}.
if not there then return {0} end
return {2, now, redis.call('HGETALL', key)}
