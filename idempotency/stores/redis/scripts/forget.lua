-- Forget a record that is not being run; 0 when there is none, or its owner is running.
-- KEYS[1] record, and the channel its watchers listen to
local found = redis.pcall('HMGET', KEYS[1], 's', 'l', 'w')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return 0 end
  return found
end
if not found[1] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = tonumber(found[2] or '')
if found[1] == '1' and lease and lease > now then return 0 end
redis.call('DEL', KEYS[1])
if found[3] == '1' then redis.pcall('PUBLISH', KEYS[1], '') end
return 1
