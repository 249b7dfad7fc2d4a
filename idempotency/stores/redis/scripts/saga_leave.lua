-- End the run of an owner: the saga waits, is stuck, or has ended. A run that has ended by this token is not changed.
-- ARGV: format, id, token, wait (ms) or '', wakes that the run has seen, reason, ttl (ms), phase or '', whether there is a
-- result, result, entries
-- Reply: {0} where the token is not the owner's, or {1}.
if not there or token ~= ARGV[3] then return {0} end
if not owned then return {1} end
-- First what needs no memory: a server whose memory is full refuses a write only to a script that has written nothing.
redis.call('PERSIST', key)
redis.call('HSET', key, 'o', '0', 'c', '0', 'r', ARGV[6])
change(8)
if (tonumber(ARGV[8]) or phase) < 3 then
  if digits(wakes) ~= ARGV[5] then
    schedule(now)
  else
    schedule(ARGV[4] ~= '' and now + ARGV[4] or nil)
  end
  return {1}
end
redis.call('HDEL', key, 'd')
for index = 2, 4 do redis.call('ZREM', KEYS[index], id) end
redis.call('ZADD', KEYS[5], digits(created), id)
redis.call('ZADD', KEYS[6], digits(now + ARGV[7]), id)
redis.call('PEXPIRE', key, ARGV[7])
-- The indexes of what has ended expire with the last of it, and meanwhile each end removes some of what has expired.
for index = 5, 6 do
  if redis.call('PTTL', KEYS[index]) < tonumber(ARGV[7]) then redis.call('PEXPIRE', KEYS[index], ARGV[7]) end
end
for _, expired in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', digits(now), 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[5], expired)
  redis.call('ZREM', KEYS[6], expired)
end
return {1}
