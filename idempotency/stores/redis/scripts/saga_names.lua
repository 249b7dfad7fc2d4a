-- Add the id of a name of sagas, if one is given; else list them.
-- KEYS: names; ARGV: id
if ARGV[1] then return redis.call('SADD', KEYS[1], ARGV[1]) end
return redis.call('SMEMBERS', KEYS[1])
