-- Own a saga that is absent or due.
-- ARGV: format, id, token, lease (ms), fingerprint, whether there is an input, input, name, key, deadline (ms) or ''
-- Reply: {0} where there is none; {1, now (ms), row} where it is not owned; {2, now, fields and values}.
if not there then
  if ARGV[6] == '0' then return {0} end
  local owner = ARGV[4] ~= '0'
  created = now
  redis.call('HSET', key, 'v', ARGV[1], 'n', ARGV[8], 'k', ARGV[9], 'p', '1', 't', owner and ARGV[3] or '',
    'o', owner and '1' or '0', 'f', ARGV[5], 'i', ARGV[7], 'a', owner and '1' or '0', 'c', '0', 'w', '0', 'r', '',
    'b', digits(now))
  if ARGV[10] ~= '' then redis.call('HSET', key, 'l', digits(now + ARGV[10])) end
  redis.call('ZADD', KEYS[3], digits(now), id)
  -- One that had its id has expired, and may still be there.
  redis.call('ZREM', KEYS[5], id)
  redis.call('ZREM', KEYS[6], id)
  schedule(now + ARGV[4])
  return {2, now, redis.call('HGETALL', key)}
end
local again = owned and token == ARGV[3]
local same = ARGV[6] == '0' or fingerprint == ARGV[5]
if ARGV[4] == '0' or ended or not same or not (again or (due and due <= now)) then
  return {1, now, redis.call('HMGET', key, unpack(FIELDS))}
end
if not again then
  if owned then crashes = crashes + 1 end
  redis.call('HSET', key, 't', ARGV[3], 'o', '1', 'a', digits(attempt + 1), 'c', digits(crashes))
end
schedule(now + ARGV[4])
return {2, now, redis.call('HGETALL', key)}
