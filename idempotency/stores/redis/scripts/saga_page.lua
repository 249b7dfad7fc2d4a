-- List the ids in an index, the earliest first.
-- KEYS: index; ARGV: whether only those until now, where to start, how many
local latest = '+inf'
if ARGV[1] == '1' then
  local time = redis.call('TIME')
  latest = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
end
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', latest, 'LIMIT', ARGV[2], ARGV[3])
